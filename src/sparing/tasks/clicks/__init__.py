"""Click prediction: which shown items are taken, from categorical and numeric features."""
