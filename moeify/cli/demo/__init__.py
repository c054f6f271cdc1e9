"""`moeify demo`: convert a pretrained model and check every claim."""
