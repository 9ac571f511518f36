"""The examples' data sets: species of bacteria by their 16S genes, and characters by their images."""
