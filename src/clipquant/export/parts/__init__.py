"""What formats are made of: the call, the graph, the record; no format is known here."""
