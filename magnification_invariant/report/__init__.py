"""Tables and pictures, read from records: nothing here trains."""
