"""Graph passes: one file per pass, the pass protocol (`base`) and the manager (`manager`)."""
