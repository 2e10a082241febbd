from fabric.app.aclient import aconnect as aconnect
from fabric.app.client import connect as connect
from fabric.core.errors import FabricError as FabricError
from fabric.jobs.spec import JobSpec as JobSpec
