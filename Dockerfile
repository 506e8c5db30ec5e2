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
 && /opt/pyflannel/bin/pip install --no-cache-dir /src \
 && /opt/pyflannel/bin/pip uninstall --yes pip setuptools

FROM debian:bookworm-slim
# The interpreter and the tools that write traffic rules carry the one capability, so that nobody has to
# be root. Folders mounted here have to be writable for user 999. Where a container must not gain
# privileges (no_new_privs) or has no CAP_NET_ADMIN, the kernel refuses to run them: use `--user root`
# and `--cap-add NET_ADMIN`. iproute2 and ping are for looking around.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      iproute2 iptables iputils-ping libcap2-bin nftables python3 \
 && mkdir -p /opt/pyflannel/bin \
 && cp /usr/bin/python3 /opt/pyflannel/bin/python3 \
 && setcap cap_net_admin+ep /opt/pyflannel/bin/python3 \
 && setcap cap_net_admin+ep /usr/sbin/xtables-nft-multi \
 && setcap cap_net_admin+ep /usr/sbin/nft \
 && useradd --system --uid 999 pyflannel \
 && install -d -o pyflannel /run/flannel /var/lib/pyflannel-udp \
 && rm -rf /var/lib/apt/lists/* /var/cache/*
COPY --from=build /opt/pyflannel/lib /opt/pyflannel/lib
COPY --from=build /opt/pyflannel/pyvenv.cfg /opt/pyflannel/
COPY --from=build /opt/pyflannel/bin/pyflannel-udp /opt/pyflannel/bin/
USER pyflannel
ENV FLANNELD_HEALTHZ_PORT=8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/opt/pyflannel/bin/python3", \
     "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/readyz')"]
ENTRYPOINT ["/opt/pyflannel/bin/pyflannel-udp"]
