"""Networks of papers that are no pruning methods: each with the paper's step, its training and its task."""
