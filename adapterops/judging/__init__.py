"""Whether a merged model is what its base and adapters make, whoever merged it."""
