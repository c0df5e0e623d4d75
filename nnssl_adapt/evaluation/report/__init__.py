"""Is this model good, and where is it wrong? One page to look through."""
