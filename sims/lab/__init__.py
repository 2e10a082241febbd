"""Networks of namespaces with NAT gateways of each kind, and real daemons in them."""
