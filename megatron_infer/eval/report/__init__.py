"""`eval report`: one HTML page about a scored run, or about two."""
