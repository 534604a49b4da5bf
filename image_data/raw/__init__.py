"""Images as they are published, before they are made a data set."""
