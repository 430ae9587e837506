"""What several tests share: builders of files, sites, studies and federations."""
