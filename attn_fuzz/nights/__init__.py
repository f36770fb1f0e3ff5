"""Campaigns that go on for nights: what they keep in one SQLite file, how they share out time, what they survive."""
