"""Graph passes, one file each. What they are built from lies in the rooms below."""
