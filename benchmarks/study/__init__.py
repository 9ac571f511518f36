"""A study of which loss suits which data, and of the effects of K, B, epsilon and max_m.

Seven losses are compared on four data sets, with equal tuning and several seeds.
"""

BALANCED, IMBALANCED = "balanced noised top-K", "imbalanced noised top-K"
