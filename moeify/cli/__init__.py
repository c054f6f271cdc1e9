"""The `moeify` command."""
