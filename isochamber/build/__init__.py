"""The products, one module each: base, layer, home, entry. What they share: state, durable, locks, inputs."""
