//! `downloader`: one HTTP/1.1 download on one connection; its length and SHA-256 have to be right.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use handover_lab::apps::{Account, content::hex, watch_over};
use sha2::{Digest as _, Sha256};

/// Downloads one file and checks it. A line on stdin asks for a report.
#[derive(Parser)]
struct Args {
    /// The web server.
    server: SocketAddr,
    /// Path on the server, "/film.bin".
    path: String,
    /// Length it has to have, bytes.
    #[arg(long)]
    bytes: u64,
    /// SHA-256 it has to have, hexadecimal.
    #[arg(long)]
    sha256: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let unharmed = watch_over(move |account| download(&args, account))?;
    Ok(if unharmed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn download(args: &Args, account: &Account) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&args.server, Duration::from_secs(5))
        .with_context(|| format!("connecting to {}", args.server))?;
    write!(stream, "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", args.path, args.server)
        .context("request")?;
    let mut input = BufReader::with_capacity(1 << 16, stream);
    let length = head(&mut input)?;
    ensure!(length == args.bytes, "the server announces {length} bytes, not {}", args.bytes);

    let mut digest = Sha256::new();
    let mut body = [0; 1 << 16];
    let mut got = 0;
    while got < length {
        let n = input.read(&mut body).with_context(|| format!("after {got} of {length} bytes"))?;
        account.arrived(Instant::now());
        if n == 0 {
            account.update(|r| r.bytes_lost = length - got);
            anyhow::bail!("the connection ended after {got} of {length} bytes");
        }
        digest.update(&body[..n]);
        got += n as u64;
        account.update(|r| r.bytes = got);
    }
    account.update(|r| r.bytes_duplicated = got.saturating_sub(length));
    let sha256 = hex(&digest.finalize());
    if sha256 != args.sha256 {
        account.update(|r| r.bytes_lost = length);
        anyhow::bail!("SHA-256 is {sha256}, not {}", args.sha256);
    }
    account.update(|r| {
        r.operations = 1;
        r.finished = true;
    });
    Ok(())
}

/// Reads the answer's head; returns its Content-Length.
fn head(input: &mut BufReader<TcpStream>) -> anyhow::Result<u64> {
    let mut line = String::new();
    input.read_line(&mut line).context("status line")?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "the server answered {:?}", line.trim_end());
    let mut length = None;
    loop {
        line.clear();
        input.read_line(&mut line).context("header")?;
        let header = line.trim_end();
        if header.is_empty() {
            return length.context("the answer has no Content-Length");
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse().context("Content-Length")?);
        }
    }
}
