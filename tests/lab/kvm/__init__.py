"""Changes of KVM, one file each: see ``kvmchange.Change``. Imports only ``kvmchange``."""
