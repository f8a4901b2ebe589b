"""The commands `complete` and `bench`, and what all commands share."""
