"""Pages and figures about adapters, folders and fleets."""
