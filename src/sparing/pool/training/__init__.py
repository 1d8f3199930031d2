"""A training set that is cleaned and valued before it is trained on."""
