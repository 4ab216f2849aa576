//! As much of the Redis protocol (RESP2) as a writer needs: requests as arrays of bulk strings, replies of every kind but
//! nested arrays.

use std::io::{self, BufRead, Write};

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Simple(String),
    /// `-ERR ...`
    Error(String),
    /// `:42`
    Integer(i64),
    /// `$3\r\nabc`; absent: the null bulk string.
    Bulk(Option<Vec<u8>>),
    /// `*2 ...` of bulk strings.
    Array(Vec<Self>),
}

/// Longest line and largest bulk string taken.
const LIMIT: usize = 1 << 20;

/// Writes one request.
///
/// # Errors
/// Those of the stream.
pub fn request(out: &mut impl Write, words: &[&str]) -> io::Result<()> {
    write!(out, "*{}\r\n", words.len())?;
    for word in words {
        write!(out, "${}\r\n{word}\r\n", word.len())?;
    }
    Ok(())
}

/// Reads one reply.
///
/// # Errors
/// Those of the stream, and `InvalidData` for what is no reply.
pub fn reply(input: &mut impl BufRead) -> io::Result<Reply> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("not a RESP reply: {what}"));
    let mut line = String::new();
    io::Read::take(&mut *input, LIMIT as u64).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let line = line.strip_suffix("\r\n").ok_or_else(|| bad(&line))?;
    let (kind, rest) = line.split_at_checked(1).ok_or_else(|| bad(line))?;
    let length = || rest.parse::<usize>().ok().filter(|n| *n <= LIMIT).ok_or_else(|| bad(line));
    match kind {
        "+" => Ok(Reply::Simple(rest.into())),
        "-" => Ok(Reply::Error(rest.into())),
        ":" => rest.parse().map(Reply::Integer).map_err(|_| bad(line)),
        "$" if rest == "-1" => Ok(Reply::Bulk(None)),
        "$" => {
            let mut data = vec![0; length()? + 2];
            input.read_exact(&mut data)?;
            if !data.ends_with(b"\r\n") {
                return Err(bad("a bulk string without its end"));
            }
            data.truncate(data.len() - 2);
            Ok(Reply::Bulk(Some(data)))
        }
        "*" => (0..length()?).map(|_| reply(input)).collect::<io::Result<_>>().map(Reply::Array),
        _ => Err(bad(line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies() {
        let mut out = Vec::new();
        request(&mut out, &["SET", "a", "12"]).unwrap();
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\n12\r\n");
        let mut input = &b"+OK\r\n:42\r\n$2\r\nab\r\n$-1\r\n-ERR no\r\n*2\r\n$1\r\na\r\n$-1\r\n"[..];
        let all: Vec<Reply> = (0..6).map(|_| reply(&mut input).unwrap()).collect();
        assert_eq!(all[0], Reply::Simple("OK".into()));
        assert_eq!(all[1], Reply::Integer(42));
        assert_eq!(all[2], Reply::Bulk(Some(b"ab".to_vec())));
        assert_eq!(all[3], Reply::Bulk(None));
        assert_eq!(all[4], Reply::Error("ERR no".into()));
        assert_eq!(all[5], Reply::Array(vec![Reply::Bulk(Some(b"a".to_vec())), Reply::Bulk(None)]));
        for wrong in [&b"OK\r\n"[..], b"+OK", b"$9999999999\r\n", b"$2\r\nabcd", b":x\r\n", b"\r\n"] {
            assert!(reply(&mut &*wrong).is_err(), "{wrong:?}");
        }
    }
}
