"""Starting weights of experts and routers."""
