"""Which values of a case's axes were reached, and which pairs of them: counted, and held against what is declared."""
