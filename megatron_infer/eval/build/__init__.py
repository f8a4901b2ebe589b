"""`eval build`: make a fill-in-the-middle benchmark from source trees."""
