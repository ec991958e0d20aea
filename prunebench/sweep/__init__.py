"""Many runs: recipes, their cells, and the engines that run them."""
