"""All that is to be known of a GPU, measured in a few minutes whenever one is at hand."""
