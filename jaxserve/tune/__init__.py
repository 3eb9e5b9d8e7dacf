"""`jaxserve tune`: sizes for the model and the machine at hand, by a short measured search."""
