"""Pictures and exercises for a class. Nothing in the product imports this package."""
