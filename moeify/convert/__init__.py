"""From a plan to a converted model, proven, and back to a dense one."""
