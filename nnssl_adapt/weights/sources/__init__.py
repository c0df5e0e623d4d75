"""Where are the files? ``resolve_source`` finds or fetches them; the only code on the network."""
