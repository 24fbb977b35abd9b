"""The replay queue: groups tagged with versions, a staleness budget, and the ledger of it all."""
