"""What a pass is: protocol, manager, records, printer, verifier, observers."""
