"""What captures find, kept from run to run under a digest of all that it depends on."""
