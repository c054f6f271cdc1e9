"""Graph passes, one file each; the rooms below hold what they are built from."""
