"""What a label is worth: which pictures of a pool to ask a person about, in two small worlds."""
