"""A client's side of a remote run, whatever the transport."""
