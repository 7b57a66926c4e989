"""What the command line does, one file for each verb, and what all of them need of a config."""
