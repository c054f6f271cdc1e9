"""Students with fewer layers, and their training (Mixture-of-Students)."""
