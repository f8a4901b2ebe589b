"""When a fill-in-the-middle completion is over: rules about text, without tokens."""
