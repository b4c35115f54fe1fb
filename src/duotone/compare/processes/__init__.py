"""Arms in processes of their own, and the turns that they take."""
