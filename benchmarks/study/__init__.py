"""A study of which loss suits which data, with equal tuning and several seeds."""
