"""Campaigns: many cases on many backends, in child processes that may die without taking anything with them."""
