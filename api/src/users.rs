//! Naming many users at once: a digest of their names, which a switch is compared by whatever their number.
//!
//! Sender and receiver have to agree on every octet of what is digested: the names sorted by their octets, each preceded by
//! its length, so that no two sets of names make the same text.

use sha2::{Digest as _, Sha256};

/// Octets of a digest.
pub const DIGEST_LEN: usize = 32;

/// The digest of `names`, in whatever order they come (`SwitchRequest.users_digest`).
pub fn digest<S: AsRef<str>>(names: &[S]) -> [u8; DIGEST_LEN] {
    let mut sorted: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    sorted.sort_unstable();
    let mut sha = Sha256::new();
    for name in sorted {
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name);
    }
    sha.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_the_names_not_of_their_order() {
        assert_eq!(digest(&["taro", "hanako"]), digest(&["hanako".to_owned(), "taro".to_owned()]));
        for other in [&["taro"][..], &["tarohanako"], &["taro", "hanak"], &["taro", "hanako", "hanako"], &[]]
        {
            assert_ne!(digest(&["taro", "hanako"]), digest(other), "{other:?}");
        }
    }

    #[test]
    fn a_digest_is_what_the_wire_says() {
        // printf '\x01\0\0\0\0\0\0\0a\x01\0\0\0\0\0\0\0b' | sha256sum
        let known = "cf6ab613e3942391f88ed698557e1680f160bd10e88c6b668c50360c10930e2b";
        let hex: String = digest(&["b", "a"]).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, known);
    }
}
