"""The ops in C++ for the CPU."""
