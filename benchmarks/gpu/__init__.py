"""The campaign on one GPU: is it right, how fast is it, and what does a rank of many do."""
