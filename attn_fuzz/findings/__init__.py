"""What is kept for people: findings, their store, regression cases, standalone scripts."""
