"""What a run trained, as a folder for the Hub (`folder`), with its card (`card`) and nothing private (`private`), and its upload (`upload`)."""
