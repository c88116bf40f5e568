"""What is kept on disk while the server runs. Knows files; does not know what is in them."""
