"""What differs between model families and pruners, as data. No torch; families.py has the list of families."""
