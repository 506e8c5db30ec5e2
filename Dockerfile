# Two images from one file: `etcd` (Debian's etcd, for docker-compose.yml) and the node itself.

FROM debian:bookworm-slim AS etcd
RUN apt-get update \
 && apt-get install -y --no-install-recommends etcd-client etcd-server \
 && rm -rf /var/lib/apt/lists/*
ENV ETCDCTL_API=3
CMD ["etcd", "--listen-client-urls", "http://0.0.0.0:2379", \
     "--advertise-client-urls", "http://etcd:2379"]

FROM debian:bookworm-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/pyflannel \
 && /opt/pyflannel/bin/pip install --no-cache-dir /src

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends iproute2 iptables iputils-ping python3 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/pyflannel /opt/pyflannel
ENTRYPOINT ["/opt/pyflannel/bin/pyflannel-udp"]
