"""The kinds of attacks of scripts/attack."""
